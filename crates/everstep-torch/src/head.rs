//! The last product of a language model together with the cross-entropies of its logits.
#![allow(unsafe_code)]

use std::ffi::c_void;

use tch::Tensor;

/// What [`cross_entropies`] gives.
#[derive(Debug)]
pub struct CrossEntropies {
    /// The sum of all that is differentiated, float32, a scalar.
    pub objective: Tensor,
    /// Each token's cross-entropy in nats, float32 `[tokens]`, 0 where the target is ignored; not differentiable.
    pub losses: Tensor,
}

unsafe extern "C" {
    fn everstep_head(
        x: *const c_void,
        weight: *const c_void,
        targets: *const c_void,
        ignored: i64,
        z_loss: f64,
        objective: *mut *mut c_void,
        losses: *mut *mut c_void,
    ) -> bool;
}

/// Cross-entropies of the logits `x weight^T`, for `x` `[tokens, width]`, `weight` `[vocab_size, width]` and int64 `targets` `[tokens]`, of which
/// those equal to the negative number `ignored` do not count. To the objective, `z_loss * logsumexp(logits)^2` of each token is added.
///
/// At most 128 MiB of float32 logits exist at once, and none when it returns: gradients are taken on the way.
/// Everything after the product is float32.
///
/// # Panics
/// Where libtorch's own functions would: out of memory, or shapes that do not fit.
pub fn cross_entropies(
    x: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    ignored: i64,
    z_loss: f64,
) -> CrossEntropies {
    let (mut objective, mut losses) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the tensors live through the call, which only reads them, and what it writes are tensors of our own.
    let is_made = unsafe {
        everstep_head(
            x.as_ptr().cast(),
            weight.as_ptr().cast(),
            targets.as_ptr().cast(),
            ignored,
            z_loss,
            &raw mut objective,
            &raw mut losses,
        )
    };
    assert!(is_made, "libtorch refused to compute cross-entropies");
    // SAFETY: both were made for us, and nobody else has them.
    let [objective, losses] =
        [objective, losses].map(|made| unsafe { Tensor::from_ptr(made.cast()) });
    CrossEntropies { objective, losses }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Reduction};

    use super::*;

    const IGNORED: i64 = -100;

    fn values(x: &Tensor) -> Vec<f32> {
        Vec::try_from(&x.to_kind(Kind::Float).flatten(0, -1)).unwrap()
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
        let largest = b.abs().max().double_value(&[]).max(1e-30);
        (a - b).abs().max().double_value(&[]) / largest
    }

    /// As libtorch's own operations do it in float64: the objective, the losses and both gradients. In float32 their gradients are off by
    /// ten times as much as ours.
    fn plain(x: &Tensor, weight: &Tensor, targets: &Tensor, z_loss: f64) -> [Tensor; 4] {
        let leaf = |x: &Tensor| x.detach().to_kind(Kind::Double).set_requires_grad(true);
        let (x, weight) = (&leaf(x), &leaf(weight));
        let logits = x.linear(weight, None::<&Tensor>);
        let losses =
            logits.cross_entropy_loss(targets, None::<&Tensor>, Reduction::None, IGNORED, 0.0);
        let squares = logits.logsumexp([-1], false).square() * targets.not_equal(IGNORED);
        let objective = losses.sum(Kind::Double) + squares.sum(Kind::Double) * z_loss;
        let mut gradients =
            Tensor::run_backward(&[&objective * 3.0], &[x, weight], false, false).into_iter();
        let mut gradient = || gradients.next().unwrap();
        let (of_x, of_weight) = (gradient(), gradient());
        [objective.detach(), losses.detach(), of_x, of_weight]
    }

    fn fused(x: &Tensor, weight: &Tensor, targets: &Tensor, z_loss: f64) -> [Tensor; 4] {
        let made = cross_entropies(x, weight, targets, IGNORED, z_loss);
        assert!(!made.losses.requires_grad());
        let objective = &made.objective * 3.0;
        let mut gradients =
            Tensor::run_backward(&[objective], &[x, weight], false, false).into_iter();
        let mut gradient = || gradients.next().unwrap();
        let (of_x, of_weight) = (gradient(), gradient());
        [made.objective.detach(), made.losses, of_x, of_weight]
    }

    fn case(tokens: i64, width: i64, vocab: i64, kind: Kind) -> [Tensor; 3] {
        tch::manual_seed(3);
        let leaf = |size: [i64; 2]| {
            let x = Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind);
            x.set_requires_grad(true)
        };
        let targets = Tensor::randint(vocab, [tokens], (Kind::Int64, Device::Cpu));
        let _ = targets.narrow(0, 1, 2).fill_(IGNORED);
        [leaf([tokens, width]), leaf([vocab, width]), targets]
    }

    #[test]
    fn it_is_what_separate_operations_give() {
        for z_loss in [0.0, 1e-2] {
            let [x, weight, targets] = case(40, 24, 65, Kind::Float);
            let expected = plain(&x, &weight, &targets, z_loss);
            let found = fused(&x, &weight, &targets, z_loss);
            for (found, expected) in found.iter().zip(&expected) {
                assert!(difference(found, expected) < 1e-6, "{found:?}");
            }
            assert_eq!(values(&found[1])[1..3], [0.0; 2]);
        }
    }

    #[test]
    fn more_logits_than_may_exist_at_once_change_only_the_order_of_additions() {
        // 672 rows of 50,000 float32 are 134 MB.
        let [x, weight, targets] = case(700, 8, 50_000, Kind::Float);
        let expected = plain(&x, &weight, &targets, 1e-3);
        let found = fused(&x, &weight, &targets, 1e-3);
        for (found, expected) in found.iter().zip(&expected) {
            assert!(difference(found, expected) < 1e-5, "{found:?}");
        }
    }

    #[test]
    fn bfloat16_is_rounded_only_where_it_is_kept() {
        let [x, weight, targets] = case(64, 32, 80, Kind::BFloat16);
        let expected = plain(&x, &weight, &targets, 0.0);
        let found = fused(&x, &weight, &targets, 0.0);
        let kinds = found.each_ref().map(Tensor::kind);
        let kept = Kind::BFloat16;
        assert_eq!(kinds, [Kind::Float, Kind::Float, kept, kept]);
        for (found, expected) in found.iter().zip(&expected) {
            assert!(difference(found, expected) < 1e-2, "{found:?}");
        }
    }

    #[test]
    fn nothing_is_differentiated_where_nobody_asks() {
        let [x, weight, targets] = case(32, 8, 30, Kind::Float);
        let with = cross_entropies(&x, &weight, &targets, IGNORED, 0.0);
        let without = tch::no_grad(|| cross_entropies(&x, &weight, &targets, IGNORED, 0.0));
        assert!(with.objective.requires_grad() && !without.objective.requires_grad());
        assert_eq!(values(&with.losses), values(&without.losses));
    }
}
