"""Fine-tunes eca_nfnet_l0 on spectrograms: one channel, not square, several labels for each clip.

Run: python examples/spectrograms.py
"""  # A name or file of weights may follow; by default they are random.

import sys

import jax
import numpy as np
import optax
from sklearn.metrics import average_precision_score

import nfnets_jax

SOUNDS = {  # frequency and loudness at t seconds, for a random pitch in Hz
    'rising': lambda t, pitch: (pitch * (1 + t), 1),
    'falling': lambda t, pitch: (pitch * (3.5 - t), 1),
    'trembling': lambda t, pitch: (2 * pitch + 0 * t, np.sin(2 * np.pi * 4 * t) ** 2),
    'knocking': lambda t, pitch: (pitch + 0 * t, np.exp(-8 * (t % 0.5))),
}


def make_clips(count, rng, rate=16_000):
    """Returns spectrograms, float32 [count, 128, 300, 1], of 3 s, and labels [count, sounds]."""
    t = np.arange(3 * rate) / rate
    labels = rng.integers(0, 2, (count, len(SOUNDS))).astype(np.float32)
    spectrograms = []
    for row in labels:
        wave = rng.normal(0, 0.3, len(t))
        for present, sound in zip(row, SOUNDS.values(), strict=True):
            frequency, loudness = sound(t, rng.uniform(300, 1000))
            wave += present * loudness * np.sin(2 * np.pi * np.cumsum(frequency) / rate)
        starts = np.linspace(0, len(t) - 512, 300).astype(int)
        frames = wave[starts[:, None] + np.arange(512)] * np.hanning(512)
        spectrograms.append(np.log(np.abs(np.fft.rfft(frames)[:, :128]).T ** 2 + 1e-3))
    x = np.stack(spectrograms)[..., None]
    return ((x - x.mean()) / x.std()).astype(np.float32), labels


def main(weights='', steps=60, batch=8, clips=128):
    rng = np.random.default_rng(0)
    (x, y), (test_x, test_y) = make_clips(clips, rng), make_clips(64, rng)
    if weights:
        options = {'num_classes': len(SOUNDS), 'channels': 1}
        network, params, state, _ = nfnets_jax.from_pretrained(weights, **options)
    else:
        network = nfnets_jax.build('eca_nfnet_l0', len(SOUNDS), channels=1)
        params, state = network.init(jax.random.key(0), x[:1], True)
    clipped = {m: dict.fromkeys(p, not m.endswith('/linear')) for m, p in params.items()}
    tx = optax.chain(
        nfnets_jax.adaptive_grad_clip(0.02, mask=clipped),  # all but the classifier
        optax.sgd(optax.cosine_decay_schedule(0.05, steps), momentum=0.9, nesterov=True),
    )

    def loss_fn(params, key, x, y):
        outputs, _ = network.apply(params, state, key, x, True)
        return optax.sigmoid_binary_cross_entropy(outputs['logits'], y).mean()

    @jax.jit
    def step(params, opt_state, key, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, key, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, losses = tx.init(params), []
    for i in range(steps):
        rows = rng.choice(clips, batch, replace=False)
        params, opt_state, loss = step(params, opt_state, jax.random.key(i), x[rows], y[rows])
        losses.append(float(loss))
        print(f'step {i}: loss {loss:.3f}')
    logits = jax.jit(lambda x: network.apply(params, state, None, x, False)[0]['logits'])
    scores = np.concatenate([logits(part) for part in np.split(test_x, len(test_x) // 8)])
    precision = average_precision_score(test_y, scores, average=None)
    print('average precision:', *(f'{n} {p:.3f}' for n, p in zip(SOUNDS, precision, strict=True)))
    return losses, precision


if __name__ == '__main__':
    main(*sys.argv[1:])
