"""The parts of `python -m train.vgg_study`."""
