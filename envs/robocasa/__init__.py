"""RoboCasa, versions 0.2 and 1.0.1, behind `envs.base.Env`. Needs packages of its own: see docs/robocasa.md."""
