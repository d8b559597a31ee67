"""What trainers of other packages need beside an optimizer, one module each; ``docs/trainers.md`` shows their use."""
