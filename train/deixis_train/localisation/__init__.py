"""Ways to say where something is, for the ablation of the paper (Table 4).

The model itself reads a location off a word's features ("regression"). The alternatives let the decoder say it: digits
written as text after the words ("text"), or tokens of their own for quantised coordinates ("tokens").
"""
