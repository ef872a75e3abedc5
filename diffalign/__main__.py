"""`python -m diffalign`, and `accelerate launch -m diffalign` for many GPUs."""

from diffalign.cli import main

if __name__ == "__main__":
    main()
