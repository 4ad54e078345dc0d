"""Programs at their last stage, made into files and run."""
