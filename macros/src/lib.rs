//! The macro behind `#[tollway::service]`; use it through `tollway`.
//!
//! `parse` reads the trait into a model and says what is wrong with it, at the place where it stands; `expand` writes the
//! model as trait, client, server and price list. What is the same for all services is no generated code, but lies in
//! `tollway::__private`.

mod expand;
mod parse;
mod price;

use proc_macro::TokenStream;

/// Makes a service of a trait: a typed client, a server and a price list.
///
/// ```ignore
/// use tollway::rpc::{CallContext, Stream};
///
/// /// Greets.
/// #[tollway::service]
/// pub trait Greeter {
///     /// By name.
///     async fn greet(&self, name: &str) -> String;
///     /// Fails with an error of its own.
///     async fn age(&self, cx: &CallContext, name: &str) -> Result<u32, Unknown>;
///     /// Streams.
///     #[price(item = 2)]
///     fn count(&self, to: u64) -> impl Stream<Item = u64>;
/// }
/// ```
///
/// **The trait** is implemented with `async fn`s; it is `Send + Sync + 'static`, and its futures are `Send`. Arguments,
/// results, errors and items are any serde types, and may hold `Tx` and `Rx`. Arguments may borrow (`&str`, `&[u8]`,
/// `Option<&str>`): the server borrows them from the request. An argument `cx: &CallContext` behind `&self` is the
/// server's own. A method returns `T` or `Result<T, E>`, or as `fn` or `async fn` an `impl Stream<Item = T>`, also
/// in a `Result`. Methods may have bodies, which are their defaults.
///
/// **`GreeterClient`** has the same methods and is `Clone`; each returns a `tollway::rpc::Call`, which is awaited. A stream
/// is an `Rx<T>` there. `tollway::Client` makes one that connects when it is needed, by `client.service()`;
/// `session.open_client::<GreeterClient>()` opens one on a session, and `GreeterClient::from(connection)` takes a connection that is
/// open, a paid one too.
///
/// **`GreeterServer::new(…)`** makes a `Service` of whatever implements the trait, for `Services::with`. `GreeterServer::NAME`,
/// `VERSION` and `prices()` say what a `Payee` wants to know.
///
/// # The service
/// `#[tollway::service(name = "org.greeter", version = 2)]`: without, the name is that of the trait in snake case, and the
/// version 1. Method ids follow from name, version and the method's name. Whoever changes the types of a method that is in use
/// gives the service a new version: the wire carries no types. A service that is `checked` makes sure: `#[tollway::service(checked)]`
/// compares a fingerprint of the signatures' text when a connection is opened, where both sides are, so that an open of other
/// signatures fails. It knows the names of types and not what is in them, and every added method changes it.
///
/// `#[idempotent]` on a method says that it may be executed twice where once was wanted, and does no harm: a `tollway::Client`
/// that is told to may then repeat a call whose connection was lost.
///
/// # Prices
/// `#[price(call = 100, item = 2, bytes = "25/KiB")]` on a method, each optional, in base units: for the call, for each item and
/// for the bytes that the server sends. `max_item = "64KiB"` and `max_answer = "1KiB"` state how large they may
/// become; they decide how far ahead a payer must sign. Without them, they are the largest that any connection allows
/// by default. A method without a price is free.
///
/// `#[price(max = 500, with = cost)]` is for calls whose cost is known at their end: 500 are reserved when the handler
/// starts, and when it has a result, `cost(…, &result)` says how many of them it costs, from the arguments and the result
/// by reference, as anything that is `Into<Amount>`. The arguments are `Clone` for that. `call` is the least that such a call
/// costs, and what it costs when it returns an error of its own; a cost above the maximum makes it a failure, which is free.
/// With `max` alone the handler commits its cost itself, by `CallContext::reservation`.
#[proc_macro_attribute]
pub fn service(arguments: TokenStream, item: TokenStream) -> TokenStream {
    parse::Service::parse(arguments.into(), item.into())
        .map(|service| expand::expand(&service))
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}
