"""What SVI maximises: one file for each way of using the log-weights."""

from pvae.objectives.cubo import CUBO
from pvae.objectives.elbo import ELBO
from pvae.objectives.importance import CIWAE, IWAE, MIWAE, PIWAE, Renyi
from pvae.objectives.objective import Objective
from pvae.objectives.schedules import Cyclical, WarmUp
from pvae.objectives.tvo import TVO
from pvae.objectives.wake_sleep import ForwardKL, ReweightedWakeSleep

__all__ = [
    "CIWAE",
    "CUBO",
    "ELBO",
    "IWAE",
    "MIWAE",
    "PIWAE",
    "TVO",
    "Cyclical",
    "ForwardKL",
    "Objective",
    "Renyi",
    "ReweightedWakeSleep",
    "WarmUp",
]
