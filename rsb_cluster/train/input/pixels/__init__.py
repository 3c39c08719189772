"""The fast CPU pixel pipeline: encoded bytes in, augmented uint8 pixels of shape (H, W, 3) out.

It does what timm's transforms on PIL do (``train.augment``), and draws the same numbers from the same seed: the same
crop, flip, operations and magnitudes. Only the arithmetic is another: libjpeg-turbo without PIL around it, torch's
antialiased resize on uint8, OpenCV and NumPy for RandAugment. How far the pixels may differ is said in ``tolerances``,
and tested.

    decode        encoded bytes -> (H, W, 3)
    draws         the generators of a sample
    crop          random resized crop and evaluation crop
    ops, affine   RandAugment's operations
    randaugment   which of them, and how strong
    transforms    FastTrain and FastEval, which put these together

The pixels lie row by row, RGB interleaved, from the decoder to the batch. OpenCV's own threads are off: the callers run
one image per thread.
"""
