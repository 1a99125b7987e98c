"""The parity ladder: same noise, same schedule, same prompts, every rung measured.

``compare`` runs the reference (a full-precision model), optional rungs in between, and the candidate. Each is measured

- *freely*: images drawn from the common noise, PSNR and SSIM against the reference's;
- *teacher-forced*: its noise prediction on the latents and embeddings of the reference's trajectory, and of the rung
  above, at every step.

A step that changes the quantizers (``quest.json``) is a *quantization* edge and has a budget; one that only changes the
runtime is a *deployment* edge and has the fixed limits of :mod:`quest_deploy.parity.gates`. How far two free runs of a
deployment edge are apart is reported, not gated: a float difference flips a code, flips cascade, and two equally good
trajectories drift apart. The content of ``report.json`` is described in :mod:`quest_deploy.parity.document`.
"""

from quest_deploy.parity.comparison import ParityResult, compare
from quest_deploy.parity.gates import Gate

__all__ = ["Gate", "ParityResult", "compare"]
