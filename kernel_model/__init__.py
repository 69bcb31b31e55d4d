"""What Linux says: the kernel's page walk and page attributes in Python, under the kernel's names, one row a variant.

It shares nothing with the machine that runs the compiled code, and is compared with it call by call (emu.check).
"""
