"""The vocabulary builder under its former name; it lives in `deixis_train.training.vocabulary`."""
