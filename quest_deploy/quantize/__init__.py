"""QuEST: the grid, quantized layers, calibration, and finetuning."""
