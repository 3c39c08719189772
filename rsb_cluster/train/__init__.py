"""The compute-node side: the only place that imports torch and timm.

Reading order: worker (one attempt), trainer (the loop), loader, augment, losses, batchnorm, evaluate, state.
"""
