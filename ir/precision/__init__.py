"""Programs computed in double precision, beside the dtypes that they name."""
