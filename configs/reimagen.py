"""Retrieved images with their captions: Re-Imagen (Chen et al. 2022) on 32x32 glyphs of ten styles.

A diffusion of pixels whose UNet attends, besides the caption, to the two images of a database whose captions are
nearest to it. Its own encoder makes feature maps of them. Training leaves the record itself out of its neighbours;
sampling guides in turns with regard to the caption and to the neighbours. The database is swapped in sampling:

    t2i data build glyphs --out data/glyphs_styles --size 32 --styles all
    t2i data neighbours configs/reimagen.py --of captions --pairs --out data/glyphs_pairs
    t2i train configs/reimagen.py --run runs/glyphs/reimagen
    t2i sample runs/glyphs/reimagen "a red heart" --guidance 3 --neighbour-guidance 3 --neighbour-share 0.5

    t2i data build glyphs --out data/glyphs_small_line --size 32 --styles openmoji-line
    t2i data neighbours configs/reimagen.py --of captions --pairs --out data/line_pairs \\
        --data.source.path=data/glyphs_small_line
    t2i sample runs/glyphs/reimagen "a red heart" --database data/line_pairs

The text encoder of the paper is T5: with a folder of one, `text` of `NeighbourPairs` is `T5("models/flan-t5-small",
WORDS)`, and `FEATURES` are of its width.
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures
from t2i_jax.networks.imagen import AttentionPooledFeatures
from t2i_jax.networks.neighbours import NeighbourMaps
from t2i_jax.networks.unet import UNet
from t2i_jax.noise.processes import Discrete
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.text.retrieval import NeighbourPairs
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

WORDS, NEIGHBOURS = 16, 2
FEATURES = CrossAttnFeatures(MiniLM.dim, WORDS)

experiment = Experiment(
    model=Diffusion(
        UNet(
            (32, 32),
            width=64,
            multipliers=(1, 2, 3),
            blocks=1,
            attention=(4,),
            conditioning=Conditioning(AttentionPooledFeatures(FEATURES, heads=6, summary=256)),
            context=128,
            context_norm="layer",
            pool="summary",
            learn_variance=False,
            neighbours=NeighbourMaps(NEIGHBOURS, dropout=0.1),
        ),
        Discrete("cosine"),
        "v",
        solver="ddim",
        sampling=DiffusionSampler(20, guidance=3.0, neighbour_guidance=3.0, threshold=0.995),
    ),
    data=Data(ArrayRecord("data/glyphs_styles"), image_size=32, batch_size=32),
    train=Train(steps=2000, optimizer=Optimizer(learning_rate=3e-4, warmup=100), ema=0.99),
    text=NeighbourPairs(MiniLM(WORDS), "data/glyphs_pairs", NEIGHBOURS, image_size=32),
)
