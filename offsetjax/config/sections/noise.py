"""The noise, its schedule, and the loss."""

from offsetjax.config.field import Change, Field, Numbers, Section, Texts
from offsetjax.config.ranges import (
    ANY,
    FINITE,
    FINITE_NUMBERS,
    PLACE,
    Range,
    Registered,
    above,
    at_least,
    at_most_letters,
    between,
    count,
    each_at_least,
    from_up_to,
    one_of,
)
from offsetjax.diffusion.density import KINDS as DENSITIES
from offsetjax.diffusion.process import PROCESSES

NOISE = Section(
    "noise",
    "The training noise: of independent pixels, or with more power where a picture's brightness is.",
    (
        Field(
            "kind",
            str,
            "offset",
            one_of("offset", "pyramid", "spectral", "adjusted"),
            "which noise: of a random offset, of several resolutions, of a spectrum, or a shift of the latents",
        ),
        Field(
            "offset_strength",
            float,
            0.0,
            at_least(0),
            "standard deviation of the offset that all pixels of a channel have in common; 0: plain noise",
            "standard deviations of the noise",
            elsewhere={
                "noise_offset": "kohya, diffusers, SimpleTuner",
                "offset_noise_weight": "OneTrainer",
                "offset_noise": "SimpleTuner",
            },
        ),
        Field(
            "channel_strengths", Numbers, (), each_at_least(0), "a strength for each channel of the latents, instead"
        ),
        Field(
            "random_strength",
            bool,
            False,
            ANY,
            "an example's strength is uniform from 0 to the one given",
            elsewhere={"noise_offset_random_strength": "kohya"},
        ),
        Field(
            "probability",
            float,
            1.0,
            above(0, at_most=1),
            "the fraction of the examples that have an offset",
            elsewhere={"noise_offset_probability": "SimpleTuner"},
        ),
        Field(
            "adaptive_scale",
            float,
            0.0,
            FINITE,
            "times the absolute mean of a latent's channel, is added to the strength",
            elsewhere={"adaptive_noise_scale": "kohya"},
        ),
        Field(
            "pyramid_discount",
            float,
            0.0,
            from_up_to(0, 1),
            "the weight of each level of noise.kind = 'pyramid', relative to the one below it",
            elsewhere={"multires_noise_discount": "kohya"},
        ),
        Field(
            "pyramid_levels",
            int,
            0,
            count(0, 16),
            "of noise.kind = 'pyramid'",
            elsewhere={"multires_noise_iterations": "kohya"},
        ),
        Field(
            "spectrum",
            Texts,
            (),
            at_most_letters(1024, each=1000),
            "of noise.kind = 'spectral': a formula of the frequency f, or one for each channel of the latents",
        ),
        Field(
            "input_perturbation",
            float,
            0.0,
            at_least(0),
            "standard deviation of further noise in the network's input alone",
            "standard deviations of the noise",
            elsewhere={
                "ip_noise_gamma": "kohya",
                "input_perturbation": "diffusers, SimpleTuner",
                "perturbation_noise_weight": "OneTrainer",
            },
        ),
        Field(
            "reference_resolution",
            int,
            0,
            count(0, 65_536),
            "the strength is for pictures of this size, at others the mean's SNR is kept; 0: it is for all",
            "pixels",
        ),
        Field(
            "anneal",
            float,
            0.0,
            Range(lambda value: 0 <= value <= 1, "at least 0 and at most 1"),
            "the fraction of the training at its end over which the noise becomes plain, and with it the model's start",
            "of train.steps",
        ),
        Field(
            "calibration",
            str,
            "",
            PLACE,
            "a file of `offsetjax calibrate`, which fills in strengths or spectrum",
            change=Change.RESUME,  # what it filled in is compared
        ),
        Field(
            "data_mean",
            Numbers,
            (),
            FINITE_NUMBERS,
            "mean of each channel of the latents, for a matched start with noise.adaptive_scale",
        ),
        Field("data_mean_std", Numbers, (), each_at_least(0), "standard deviation of that mean over pictures"),
    ),
)

SCHEDULE = Section(
    "schedule",
    "How much noise each timestep has, and what the network predicts; model.pretrained brings its own.",
    (
        Field(
            "process",
            str,
            "variance_preserving",
            Registered(PROCESSES),
            "how data becomes noise, x_t = α(t) x0 + σ(t) n: variance_preserving (DDPM), or flow (rectified flow)",
            elsewhere={"flow_matching": "kohya, SimpleTuner"},
        ),
        Field(
            "shift",
            float,
            1.0,
            above(0),
            "what σ/α is multiplied by at each timestep of a flow's training density and sampler",
            elsewhere={"discrete_flow_shift": "kohya", "flow_shift": "diffusers", "flow_schedule_shift": "SimpleTuner"},
        ),
        Field(
            "shift_rule",
            str,
            "fixed",
            one_of("fixed", "resolution", "tokens"),
            "the shift of other sizes: the same, times √(m/n) for n pixels of shift_resolution, or FLUX's by tokens",
        ),
        Field(
            "shift_resolution", int, 0, count(0), "the size that shift is for, by shift_rule = 'resolution'", "pixels"
        ),
        Field(
            "conversion",
            str,
            "plain",
            one_of("plain", "mapped"),
            "how a model of ε or v is trained as a flow: it becomes one, or keeps to its own timesteps and "
            "predictions, by default if it predicts v",
        ),
        Field("num_train_timesteps", int, 1000, count(2, 1_000_000), "timesteps from data to noise"),
        Field("beta_start", float, 0.00085, between(0, 1), "variance of the noise that the first timestep adds"),
        Field("beta_end", float, 0.012, between(0, 1), "variance of the noise that the last timestep adds"),
        Field(
            "prediction_type",
            str,
            "epsilon",
            one_of("epsilon", "v_prediction"),
            "what the network predicts: the noise, or the velocity",
            elsewhere={"v_parameterization": "kohya"},
        ),
        Field(
            "zero_terminal_snr",
            bool,
            False,
            ANY,
            "the betas are rescaled so that nothing of the picture is left at the last timestep",
            elsewhere={
                "zero_terminal_snr": "kohya",
                "rescale_betas_zero_snr": "diffusers, SimpleTuner",
                "rescale_noise_scheduler_to_zero_terminal_snr": "OneTrainer",
            },
        ),
    ),
)

TIMESTEPS = Section(
    "timesteps",
    "Which timesteps are trained on; in a flow shifted by schedule.shift.",
    (
        Field(
            "density",
            str,
            "uniform",
            one_of(*DENSITIES),
            "of the timesteps, from no noise to noise alone",
            elsewhere={"weighting_scheme": "diffusers, kohya", "timestep_sampling": "kohya"},
        ),
        Field(
            "mean",
            float,
            0.0,
            FINITE,
            "of logit_normal's normal; above 0 it leans to noise",
            elsewhere={"logit_mean": "diffusers, kohya, with the opposite sign"},
        ),
        Field(
            "std",
            float,
            1.0,
            above(0),
            "standard deviation of logit_normal's normal",
            elsewhere={"logit_std": "diffusers, kohya"},
        ),
        Field(
            "mode_scale",
            float,
            0.0,
            Range(lambda value: -1 <= value <= 1.752, "at least -1 and at most 1.752"),
            "of mode: above 0 it leans to the middle, below 0 to the ends",
        ),
        Field(
            "stratified",
            bool,
            False,
            ANY,
            "each example of a global batch draws from a stratum of its own, so that a batch covers the density evenly",
        ),
    ),
)

LOSS = Section(
    "loss",
    "What the loss weighs.",
    (
        Field(
            "min_snr_gamma",
            float,
            0.0,
            at_least(0),
            "weights are cut where the SNR is above it; 0: they are not",
            elsewhere={"min_snr_gamma": "kohya", "snr_gamma": "diffusers, SimpleTuner"},
        ),
        Field(
            "min_timestep",
            int,
            0,
            count(0),
            "no timestep below it is trained",
            elsewhere={
                "min_timestep": "kohya",
                "timestep_bias_begin": "diffusers",
                "min_noising_strength": "OneTrainer",
            },
        ),
        Field(
            "max_timestep",
            int,
            0,
            count(0),
            "no timestep from it on is trained; 0: all are, up to schedule.num_train_timesteps",
            elsewhere={
                "max_timestep": "kohya",
                "timestep_bias_end": "diffusers",
                "max_noising_strength": "OneTrainer",
            },
        ),
        Field(
            "weighting",
            str,
            "none",
            one_of("none", "sigma_sqrt", "cosmap"),
            "of a flow's timesteps: 1 / t², or 2 / (π (1 - 2t + 2t²))",
        ),
        Field("kl_weight", float, 1e-6, at_least(0), "of the latents' divergence from a normal, for an autoencoder"),
    ),
)
