"""Who must answer for a model: bills of materials, runs that are repeated, and manifests of several runs."""
