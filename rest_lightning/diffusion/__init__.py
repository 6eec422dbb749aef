"""Pure functions of the diffusion process: sigma tables, noise schedules, sampling, losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rest_lightning.names import lazy

if TYPE_CHECKING:
    from rest_lightning.diffusion.losses import asd_loss as asd_loss
    from rest_lightning.diffusion.losses import flow_matching_loss as flow_matching_loss
    from rest_lightning.diffusion.losses import speech_ae_loss as speech_ae_loss
    from rest_lightning.diffusion.noise import SigmaSchedule as SigmaSchedule
    from rest_lightning.diffusion.noise import noisy_path as noisy_path
    from rest_lightning.diffusion.noise import sample_sigmas_ans as sample_sigmas_ans
    from rest_lightning.diffusion.noise import sample_sigmas_cans as sample_sigmas_cans
    from rest_lightning.diffusion.rollout import roll_out as roll_out
    from rest_lightning.diffusion.sampling import Guidance as Guidance
    from rest_lightning.diffusion.sampling import Sampling as Sampling
    from rest_lightning.diffusion.sampling import SamplingChanges as SamplingChanges
    from rest_lightning.diffusion.sampling import euler_step as euler_step
    from rest_lightning.diffusion.sampling import integrate as integrate
    from rest_lightning.diffusion.schedule import ltx_sigma_table as ltx_sigma_table
    from rest_lightning.diffusion.schedule import sampling_sigmas as sampling_sigmas
    from rest_lightning.diffusion.schedule import sigma_table as sigma_table
    from rest_lightning.diffusion.schedule import training_table as training_table

__all__, __getattr__ = lazy(
    __name__,
    {
        "losses": ["asd_loss", "flow_matching_loss", "speech_ae_loss"],
        "noise": ["SigmaSchedule", "noisy_path", "sample_sigmas_ans", "sample_sigmas_cans"],
        "rollout": ["roll_out"],
        "sampling": ["Guidance", "SamplingChanges", "Sampling", "euler_step", "integrate"],
        "schedule": ["ltx_sigma_table", "sampling_sigmas", "sigma_table", "training_table"],
    },
)
