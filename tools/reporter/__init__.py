"""The page of `--report R.html`: what each pass did, with drawings, numbers and costs."""
