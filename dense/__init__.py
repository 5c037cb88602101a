"""Dense prediction with HorNet: segmentation and detection, on the house's Trainer. Nothing imports it."""
