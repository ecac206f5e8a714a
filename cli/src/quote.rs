//! `tollway quote`: what a service costs, and who says so.

use clap::Args;
use serde::Serialize;
use tollway::SessionConfig;
use tollway::payment::{WalletError, quote};
use tollway_protocol::error::Reason;
use tollway_protocol::payment::{Address, Amount, Terms};

use crate::failure::Failure;
use crate::files;
use crate::output;
use crate::tls::ClientArguments;
use crate::units::Place;

/// Asks for the terms of a service, verifies that its payee has signed them, and prints them. Nothing is paid.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Where the service is, such as tcp://127.0.0.1:7400.
    #[arg(value_name = "URL")]
    url: Place,
    /// The name of the service.
    #[arg(long, default_value = files::SERVICE)]
    service: String,
    /// Refuse terms of another payee.
    #[arg(long, value_name = "ADDRESS")]
    payee: Option<Address>,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    tls: ClientArguments,
}

/// What `--json` prints. Sums are decimal strings.
#[derive(Serialize)]
struct Shown<'a> {
    service: &'a str,
    free: bool,
    payee: Option<Address>,
    escrow: Option<Address>,
    chain_id: Option<String>,
    token: Option<Address>,
    minimum_deposit: Option<Amount>,
    suggested_deposit: Option<Amount>,
    minimum_delta: Option<Amount>,
    in_flight_cap: Option<Amount>,
    lease: Option<Amount>,
    patience_ms: Option<u64>,
    ledger: Option<&'a str>,
    methods: Vec<Method<'a>>,
}

#[derive(Serialize)]
struct Method<'a> {
    name: &'a str,
    price: String,
    largest_item: u64,
    largest_answer: u64,
}

impl<'a> Shown<'a> {
    fn of(service: &'a str, terms: Option<&'a Terms>) -> Self {
        let methods = terms.map_or(&[][..], |terms| &terms.methods).iter().map(|method| Method {
            name: &method.name,
            price: output::price(&method.price),
            largest_item: method.max_item_bytes,
            largest_answer: method.max_answer_bytes,
        });
        Shown {
            service,
            free: terms.is_none(),
            payee: terms.map(|terms| terms.payee),
            escrow: terms.map(|terms| terms.escrow),
            chain_id: terms.map(|terms| terms.chain_id.to_string()),
            token: terms.map(|terms| terms.token),
            minimum_deposit: terms.map(|terms| terms.minimum_deposit),
            suggested_deposit: terms.map(|terms| terms.suggested_deposit),
            minimum_delta: terms.map(|terms| terms.minimum_delta),
            in_flight_cap: terms.map(|terms| terms.in_flight_cap),
            lease: terms.map(|terms| terms.lease),
            patience_ms: terms.map(|terms| terms.patience_ms),
            ledger: terms.and_then(|terms| terms.ledger_url.as_deref()),
            methods: methods.collect(),
        }
    }
}

pub(crate) async fn run(arguments: Arguments) -> Result<(), Failure> {
    let Arguments { url, service, payee, json, tls } = arguments;
    let session = tollway::connect_with(&url.0, SessionConfig::default(), &tls.options()?).await?;
    let terms = match quote(&session, &service, payee).await {
        Ok(terms) => Some(terms),
        Err(WalletError::NotPriced) => None,
        Err(error) => return Err(error.into()),
    };
    session.close(Reason::none());
    if json {
        return Ok(output::json(&Shown::of(&service, terms.as_ref()))?);
    }
    match &terms {
        Some(terms) => output::line(&output::terms(terms))?,
        None => output::line(&format!("{service} costs nothing"))?,
    }
    Ok(())
}
