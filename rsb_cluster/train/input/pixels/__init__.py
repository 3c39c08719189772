"""The fast CPU pixel pipeline: encoded bytes in, augmented uint8 pixels of shape (H, W, 3) out.

It does the same as timm's transforms on PIL (``train.augment``), and draws the same numbers from the same seed: the
same crop, flip, operations and magnitudes. Only the arithmetic differs: libjpeg-turbo without PIL, torch's antialiased
resize on uint8, OpenCV and NumPy for RandAugment. ``tolerances`` bounds the differences of the pixels.

    decode        encoded bytes -> (H, W, 3)
    draws         the generators of a sample
    crop          random resized crop and evaluation crop
    ops, affine   RandAugment's operations
    randaugment   the choice of operations and their magnitudes
    transforms    FastTrain and FastEval, which combine these

The pixels are stored row by row, RGB interleaved, from the decoder to the batch. OpenCV's own threads are disabled, as
the callers process one image per thread.
"""
