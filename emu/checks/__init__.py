"""Compiled kernel functions against kernel_model, case by case, and two kernels against each other.

world.py has the two memories and the events, trees.py random tables, harness.py what each function's file offers;
campaign.py runs them, registry.py names them.
"""
