"""First configuration of a new project: survey of text and machine, choice of sizes, commented YAML files."""
