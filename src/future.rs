//! Futures behind object-safe traits.

use std::future::Future;
use std::pin::Pin;

/// A future on the heap: what the methods of an object-safe async trait return.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
