//! Activation recomputation (Chen et al. 2016): of a part of a model only the input is kept for backward, which computes the rest again.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Tensor;

/// A part of a model: some outputs for an input.
type Part = Box<dyn Fn(&Tensor) -> Vec<Tensor> + Send>;

type Compute = extern "C" fn(*mut c_void, *mut c_void, *mut c_void) -> i32;
type Drop = extern "C" fn(*mut c_void);
type Receive = extern "C" fn(*mut c_void, *mut c_void);

unsafe extern "C" {
    fn everstep_output(outputs: *mut c_void, output: *const c_void);
    fn everstep_recompute(
        x: *const c_void,
        parameters: *const *const c_void,
        num_parameters: i64,
        draws: i32,
        closure: *mut c_void,
        compute: Compute,
        drop: Drop,
        receiver: *mut c_void,
        receive: Receive,
    ) -> i32;
}

/// The outputs of `part`, whose gradients by `x` and by `parameters` take another computation of it: the same bits, less memory.
///
/// `parameters` are all other tensors by which anything in it is differentiated. `draws` says whether it draws from libtorch's generator;
/// the second computation then draws the same, and nobody else may draw meanwhile. Backward runs it on another thread on some devices.
///
/// # Panics
/// If it panics, or libtorch fails in it.
pub fn recomputed(
    x: &Tensor,
    parameters: &[Tensor],
    draws: bool,
    part: impl Fn(&Tensor) -> Vec<Tensor> + Send + 'static,
) -> Vec<Tensor> {
    let part: Box<Part> = Box::new(Box::new(part));
    let parameters: Vec<*const c_void> = parameters.iter().map(|it| it.as_ptr().cast()).collect();
    let mut outputs: Vec<Tensor> = Vec::new();
    // SAFETY: the tensors and `outputs` live through the call; the closure is given away, to be dropped by `drop_part` once.
    let failed = unsafe {
        everstep_recompute(
            x.as_ptr().cast(),
            parameters.as_ptr(),
            parameters.len() as i64,
            draws.into(),
            Box::into_raw(part).cast(),
            compute_part,
            drop_part,
            (&raw mut outputs).cast(),
            receive,
        )
    };
    assert!(failed == 0, "libtorch refused to compute a part of a model");
    outputs
}

extern "C" fn compute_part(closure: *mut c_void, input: *mut c_void, outputs: *mut c_void) -> i32 {
    // SAFETY: the closure is the box that `recomputed` gave away; the input was made for us, and nobody else has it.
    let (part, input) = unsafe { (&*closure.cast::<Part>(), Tensor::from_ptr(input.cast())) };
    // A panic must not unwind into C++; it was printed.
    let Ok(made) = catch_unwind(AssertUnwindSafe(|| part(&input))) else {
        return 1;
    };
    for output in &made {
        // SAFETY: `outputs` came with the call, and the output is copied.
        unsafe { everstep_output(outputs, output.as_ptr().cast()) };
    }
    0
}

extern "C" fn drop_part(closure: *mut c_void) {
    // SAFETY: the graph that owned the box is gone.
    drop(unsafe { Box::from_raw(closure.cast::<Part>()) });
}

extern "C" fn receive(receiver: *mut c_void, output: *mut c_void) {
    // SAFETY: the receiver is the vector of the call that is running; the output was made for us.
    let (outputs, output) = unsafe {
        (
            &mut *receiver.cast::<Vec<Tensor>>(),
            Tensor::from_ptr(output.cast()),
        )
    };
    outputs.push(output);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use tch::{Device, Kind};

    fn values(x: &Tensor) -> Vec<f32> {
        Vec::try_from(&x.flatten(0, -1)).unwrap()
    }

    #[test]
    fn gradients_have_the_bits_of_those_that_keep_everything() {
        let leaf = |len: i64, step: f64| {
            (Tensor::arange(len, (Kind::Float, Device::Cpu)) * step - 1.0).set_requires_grad(true)
        };
        let (x, w) = (leaf(64, 0.03), leaf(64, 0.01));
        let part = |x: &Tensor, w: &Tensor| {
            // Draws, so that equal gradients say that it drew the same again.
            let y = (x * w).sigmoid().dropout(0.5, true);
            let loss = (&y * w).sum(Kind::Float);
            vec![y, loss]
        };
        let gradients = |outputs: Vec<Tensor>| {
            let next = Tensor::rand([64], (Kind::Float, Device::Cpu));
            let objective = (&outputs[0] * &next).sum(Kind::Float) + &outputs[1] * 3.0;
            let found = Tensor::run_backward(&[&objective], &[&x, &w], false, false);
            let after = Tensor::rand([1], (Kind::Float, Device::Cpu));
            (values(&found[0]), values(&found[1]), values(&after))
        };
        tch::manual_seed(5);
        let kept = gradients(part(&(&x * 1.0), &w));
        tch::manual_seed(5);
        let calls = Arc::new(AtomicUsize::new(0));
        let (counter, shared) = (calls.clone(), w.shallow_clone());
        let outputs = recomputed(&(&x * 1.0), &[w.shallow_clone()], true, move |x| {
            counter.fetch_add(1, Ordering::Relaxed);
            part(x, &shared)
        });
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        assert_eq!(gradients(outputs), kept);
        assert_eq!(calls.load(Ordering::Relaxed), 2);
        assert_eq!(
            Arc::strong_count(&calls),
            1,
            "the graph is gone, and the part with it"
        );
        assert!(kept.0.contains(&0.0), "nothing was dropped");
    }

    #[test]
    #[should_panic(expected = "refused")]
    fn a_panic_inside_comes_out() {
        let x = Tensor::ones([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        recomputed(&x, &[], false, |_| panic!("inside"));
    }
}
