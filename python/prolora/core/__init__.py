"""The mathematics: tensors in, tensors out.

Needs torch and the native ops only: the folder can be copied into another package and used there.
"""
