"""Training and evaluation: the only folder that imports torch and timm.

Reading order: worker (one attempt), trainer (the loop), input, augment, losses, batchnorm, validation, state.
"""
