"""``python -m sb3_ppo_plus.zoo``."""

from sb3_ppo_plus.zoo import main

if __name__ == "__main__":
    main()
