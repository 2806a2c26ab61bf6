"""What maintainers run and learners do not: the builder of the notebooks."""
