"""Which samples, in which order, and how they arrive: catalog -> order -> reader -> stream."""
