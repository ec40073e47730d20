"""Plan, layout of the output, row blocks, engine: a base and adapters become a model."""
