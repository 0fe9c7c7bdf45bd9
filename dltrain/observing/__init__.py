"""catalogue -> ledger -> hub -> report: what is measured, and who may see it."""
