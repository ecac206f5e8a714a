//! What the code that `#[tollway::service]` generates stands on. Not for use by hand: it changes with the macro.

use std::future::Future;
use std::time::Duration;

use futures_core::Stream;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::payment::{Amount, MethodPrice, Price, Rate, parse_bytes};

use super::call::Call;
use super::meter;
use super::method::{Method, MethodId};
use super::outgoing::Caller;
use super::scope::Scope;
use super::service::{Reply, SHORT};
use super::stream::stream;
use super::stream_core::OUTBOX_BYTES;

/// The largest body and item by default, in bytes.
pub const MAX_BODY: u64 = ConnectionLimits::DEFAULT.max_body as u64;

/// How long a handler may take to count as short, if nothing else is said.
pub const INLINE_WITHIN: Option<Duration> = Some(SHORT);

/// Arguments can be encoded here and decoded there, where they may borrow.
pub const fn travels<'de, T: Serialize + Deserialize<'de>>() {}

/// Results can be encoded there and decoded here.
pub const fn is_owned<T: Serialize + DeserializeOwned>() {}

/// A call with the error of its method.
pub fn call<'a, A: Serialize, R, E>(caller: &'a Caller, method: &'static Method, args: &A) -> Call<'a, R, E> {
    caller.call_named(method, args)
}

/// The fingerprint of the signatures of a service.
pub const fn fingerprint(signatures: &str) -> u64 {
    MethodId::of("", 0, signatures).0
}

/// A rate in an attribute.
pub const fn rate(text: &str) -> Rate {
    match Rate::parse(text) {
        Ok(rate) => rate,
        Err(_) => panic!("a rate is AMOUNT/UNIT, such as 25/KiB, with the units B, KiB, MiB, GiB"),
    }
}

/// A size in an attribute, in bytes.
pub const fn size(text: &str) -> u64 {
    match parse_bytes(text) {
        Some(bytes) => bytes,
        None => panic!("a size is a number of B, KiB, MiB or GiB, such as 64KiB"),
    }
}

/// A price in attributes.
pub const fn price(call: u128, item: u128, bytes_out: Option<Rate>, max: Option<u128>) -> Price {
    let max = match max {
        Some(max) => Some(Amount::new(max)),
        None => None,
    };
    Price { call: Amount::new(call), item: Amount::new(item), bytes_out, bytes_in: None, max }
}

/// An entry of a price list.
pub fn method_price(of: (&str, u32, &str), price: Price, [max_item_bytes, max_answer_bytes]: [u64; 2]) -> MethodPrice {
    let (service, version, method) = of;
    let method_id = MethodId::of(service, version, method).0;
    MethodPrice { method_id, name: method.to_owned(), price, max_item_bytes, max_answer_bytes }
}

/// Answers a call that returns a stream.
#[derive(Debug)]
pub struct StreamReply(oneshot::Sender<Reply>);

impl StreamReply {
    /// Answers with something else than a stream.
    pub fn answer(self, reply: Reply) {
        // Fails if the caller has lost interest.
        let _cancelled = self.0.send(reply);
    }

    /// Answers with the stream, and then sends its items for as long as they are wanted.
    pub async fn feed<S: Stream>(self, items: S)
    where
        S::Item: Serialize,
    {
        let (tx, rx) = stream::<S::Item>();
        self.answer(Reply::ok(&rx));
        meter::feed(items, tx, OUTBOX_BYTES).await;
    }
}

/// Ends a task that has not answered.
struct Unanswered(Option<JoinHandle<()>>);

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(task) = self.0.take() {
            task.abort();
        }
    }
}

/// Runs a handler whose stream goes on after the answer. It is a task of its own, which may borrow from the service and the
/// arguments; until it has answered it ends with the call.
pub async fn streaming<F, H>(handler: F) -> Reply
where
    F: FnOnce(StreamReply) -> H + Send + 'static,
    H: Future<Output = ()> + Send + 'static,
{
    let (answer, answered) = oneshot::channel();
    let handler = Scope::current().hold(handler(StreamReply(answer)));
    let mut task = Unanswered(Some(tokio::spawn(handler)));
    // An error: the handler panicked.
    let reply = answered.await.unwrap_or_else(|_| Reply::failed());
    task.0 = None;
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_have_the_defaults_and_the_units_of_everything_else() {
        assert_eq!(MAX_BODY, u64::from(ConnectionLimits::default().max_body));
        assert_eq!(MAX_BODY, u64::from(ConnectionLimits::default().max_item));
        assert_eq!(Ok(rate("25/KiB")), "25/KiB".parse());
        assert_eq!(size("64KiB"), 64 * 1024);
    }

    #[test]
    #[should_panic(expected = "a rate is AMOUNT/UNIT")]
    fn what_is_no_rate_does_not_compile_as_a_constant() {
        rate("25 per KiB");
    }
}
