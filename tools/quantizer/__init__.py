"""What kvc8-quantize is made of: calibration texts, measurements, recipes and the writer."""
