import sys

from deixis_train.data.scenes.generate import main

if __name__ == "__main__":
    sys.exit(main())
