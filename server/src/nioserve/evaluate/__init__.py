"""`nioserve evaluate`: what a conversion cost, measured on the code that serves.

`measure` runs one model, `report` compares two measurements and judges them.
"""
