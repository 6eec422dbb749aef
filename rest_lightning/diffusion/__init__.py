"""Pure functions of the diffusion process: sigma tables, noise schedules, sampling, losses."""
