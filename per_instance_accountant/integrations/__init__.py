"""Training frameworks that own the loop: Lightning, the Hugging Face Trainer, Accelerate.

Each lives in a module of its own, so that only the framework that is used need be installed:
``integrations.lightning``, ``integrations.transformers``, ``integrations.accelerate``.
"""
