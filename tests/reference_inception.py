"""The Inception network of pytorch-fid written out in PyTorch, block by block, to compare ours with."""

import torch
import torch.nn.functional as F
from torch import nn


class C(nn.Module):
    def __init__(self, c, f, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c, f, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(f, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def average(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class A(nn.Module):
    def __init__(self, c, pool):
        super().__init__()
        self.branch1x1 = C(c, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = C(c, 48, 1), C(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = C(c, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = C(64, 96, 3, padding=1), C(96, 96, 3, padding=1)
        self.branch_pool = C(c, pool, 1)

    def forward(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(average(x))], 1)


class B(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.branch3x3 = C(c, 384, 3, 2)
        self.branch3x3dbl_1 = C(c, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = C(64, 96, 3, padding=1), C(96, 96, 3, 2)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class Seven(nn.Module):
    def __init__(self, c, m):
        super().__init__()
        wide, tall = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = C(c, 192, 1)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = C(c, m, 1), C(m, m, **wide), C(m, 192, **tall)
        self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3 = C(c, m, 1), C(m, m, **tall), C(m, m, **wide)
        self.branch7x7dbl_4, self.branch7x7dbl_5 = C(m, m, **tall), C(m, 192, **wide)
        self.branch_pool = C(c, 192, 1)

    def forward(self, x):
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average(x))], 1)


class D(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = C(c, 192, 1), C(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = C(c, 192, 1), C(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = C(192, 192, (7, 1), padding=(3, 0)), C(192, 192, 3, 2)

    def forward(self, x):
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class E(nn.Module):
    def __init__(self, c, pool):
        super().__init__()
        wide, tall = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = C(c, 320, 1)
        self.branch3x3_1, self.branch3x3_2a, self.branch3x3_2b = C(c, 384, 1), C(384, 384, **wide), C(384, 384, **tall)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = C(c, 448, 1), C(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = C(384, 384, **wide), C(384, 384, **tall)
        self.branch_pool = C(c, 192, 1)
        self.pool = pool

    def forward(self, x):
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = average(x) if self.pool == "mean" else F.max_pool2d(x, 3, 1, 1)
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """(b, 3, i, j) in [0, 1] -> pooled features (b, 2048)."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = C(3, 32, 3, 2), C(32, 32, 3)
        self.Conv2d_2b_3x3 = C(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = C(64, 80, 1), C(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a = A(192, 32), A(256, 64), A(288, 64), B(288)
        self.Mixed_6b, self.Mixed_6c = Seven(768, 128), Seven(768, 160)
        self.Mixed_6d, self.Mixed_6e = Seven(768, 160), Seven(768, 192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = D(768), E(1280, "mean"), E(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x, size=299):
        x = 2 * F.interpolate(x, (size, size), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(self, f"Mixed_{name}")(x)
        return x.mean((2, 3))
