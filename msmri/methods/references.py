"""Whom to cite for posterior sampling with diffusion priors, as BibTeX."""

AALI = """@inproceedings{aali2025ambient,
  title = {Ambient Diffusion Posterior Sampling: Solving Inverse Problems with Diffusion Models Trained on
    Corrupted Data},
  author = {Aali, Asad and Daras, Giannis and Levac, Brett and Kumar, Sidharth and Dimakis, Alexandros G. and Tamir,
    Jonathan I.},
  booktitle = {International Conference on Learning Representations}, year = {2025}, note = {arXiv:2403.08728}
}"""
JALAL = """@inproceedings{jalal2021robust,
  title = {Robust Compressed Sensing {MRI} with Deep Generative Priors},
  author = {Jalal, Ajil and Arvinte, Marius and Daras, Giannis and Price, Eric and Dimakis, Alexandros G. and Tamir,
    Jonathan I.},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2021}
}"""
CHUNG = """@inproceedings{chung2023diffusion,
  title = {Diffusion Posterior Sampling for General Noisy Inverse Problems},
  author = {Chung, Hyungjin and Kim, Jeongsol and McCann, Michael T. and Klasky, Marc L. and Ye, Jong Chul},
  booktitle = {International Conference on Learning Representations}, year = {2023}
}"""
WANG = """@inproceedings{wang2023zero,
  title = {Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model},
  author = {Wang, Yinhuai and Yu, Jiwen and Zhang, Jian},
  booktitle = {International Conference on Learning Representations}, year = {2023}
}"""
ZHU = """@inproceedings{zhu2023denoising,
  title = {Denoising Diffusion Models for Plug-and-Play Image Restoration},
  author = {Zhu, Yuanzhi and Zhang, Kai and Liang, Jingyun and Cao, Jiezhang and Wen, Bihan and Timofte, Radu and
    Van Gool, Luc},
  booktitle = {{CVPR} Workshop on New Trends in Image Restoration and Enhancement}, year = {2023}
}"""
