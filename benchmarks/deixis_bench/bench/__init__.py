"""`deixis bench`: time, memory and energy of a bundle, stage by stage, against what the machine can do.

benchmarks/PROTOCOL.md says what is measured and how; every number of a report is explained there.
"""
