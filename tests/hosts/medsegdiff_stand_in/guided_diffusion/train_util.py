import os

import torch


class TrainLoop:
    def __init__(self, *, model, classifier, diffusion, data, dataloader, batch_size, microbatch, lr, out_dir):
        self.model, self.diffusion, self.dataloader, self.microbatch, self.out_dir = model, diffusion, dataloader, microbatch, out_dir
        self.step = 0
        self.opt = torch.optim.AdamW(list(model.parameters()), lr=lr)

    def run_loop(self, epochs):
        for _ in range(epochs):
            for batch, cond in self.dataloader:
                self.run_step(batch, cond)
                self.step += 1
        torch.save(self.model.state_dict(), os.path.join(self.out_dir, "savedmodel.pt"))

    def run_step(self, batch, cond):
        batch = torch.cat((batch, cond), dim=1)
        self.opt.zero_grad()
        for i in range(0, batch.shape[0], self.microbatch):
            micro = batch[i : i + self.microbatch].to("cpu")
            losses, _ = self.diffusion.training_losses_segmentation(self.model, None, micro, torch.randint(0, 3, (len(micro),)))
            (losses["loss"] + 10 * losses["loss_cal"]).mean().backward()
        self.opt.step()
