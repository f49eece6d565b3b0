"""Stand-ins for RoboCasa's 10 GB of assets, for smoke tests of the real RoboCasa code without the download.

`prepare` writes them, `install` makes this process use them. Numbers from stand-ins are no RoboCasa results: whatever
shows them says `LABEL`.
"""

from envs.robocasa.standin.assets import LABEL, folder, install, prepare

__all__ = ["LABEL", "folder", "install", "prepare"]
