import torch


class GaussianDiffusion:
    def __init__(self, *, betas, steps=3):
        self.steps = steps

    def training_losses_segmentation(self, model, classifier, x_start, t, model_kwargs=None, noise=None):
        x_t = x_start.float()
        mask = (x_start[:, -1:] > 0).float()
        # In place, as the host does it: the microbatch's mask becomes noise.
        x_t[:, -1:] = mask + torch.randn_like(mask)
        output, cal = model(x_t, t)
        return {"loss": ((output[:, :1] - mask) ** 2).mean(dim=(1, 2, 3)), "loss_cal": ((mask - cal) ** 2).mean(dim=(1, 2, 3))}, output

    def p_sample_loop_known(self, model, shape, img, step=1000, org=None, noise=None, clip_denoised=True, model_kwargs=None):
        known, state = img[:, :-1], torch.randn_like(img[:, :1])
        for i in range(self.steps)[::-1]:
            with torch.no_grad():
                output, cal = model(torch.cat([known, state], dim=1).float(), torch.tensor([i] * shape[0]))
            state = output[:, :1]
        return state, known, img, cal, torch.clamp(cal + 0.25 * state, 0, 1)
