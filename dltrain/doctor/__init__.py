"""The doctor: what a machine, a cluster, a store or a spec lacks for a run, and what to do about it.

dltrain doctor [SPEC] [--address HOST:6379]

Facts are collected at the edges (`facts`, `probe`, `visitor`), each with a time limit, and judged by pure functions
(`machine`, `gpu`, `nodes`, `job`, `storage`), which give findings.
"""
