"""A sweep over every causal language model in transformers: is what fkernel says of it true?

sizes       small sizes, by field name and by model type
settings    a tiny model of every type
oracle      plain autograd and central differences, one sequence at a time
judge       one row: each quantity against the oracle, and the verdict
workers     a process for each type, with a time limit
table       rows as tables: for a terminal and for docs/architectures.md
"""
