//! Orders to a ledger, and what is in an account there.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde::Serialize;
use tollway::escrow::{EscrowError, EscrowRefusal, LedgerClient};
use tollway_protocol::payment::ledger_messages::{Fund, LedgerMessage, Signed, Transfer};
use tollway_protocol::payment::{Address, Amount, SecretKey};

use crate::failure::Failure;
use crate::units::Place;
use crate::{keys, output};

/// How long an order is good for.
const LIFETIME: Duration = Duration::from_secs(300);
/// How often an order is sent again whose answer was lost: the ledger carries it out once.
const TRIES: u32 = 3;

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  \
    tollway ledger fund tcp://127.0.0.1:7300 --key ledger.key --to 0x… --amount 1000000")]
pub(crate) struct FundArguments {
    /// Where the ledger is.
    #[arg(value_name = "URL")]
    ledger: Place,
    /// The ledger's own key.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Whose account.
    #[arg(long, value_name = "ADDRESS")]
    to: Address,
    /// How much, in base units.
    #[arg(long)]
    amount: Amount,
    /// The token.
    #[arg(long, value_name = "ADDRESS", default_value_t = Address::ZERO)]
    token: Address,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BalanceArguments {
    /// Where the ledger is.
    #[arg(value_name = "URL")]
    ledger: Place,
    /// Whose account.
    #[arg(value_name = "ADDRESS")]
    holder: Address,
    /// The token.
    #[arg(long, value_name = "ADDRESS", default_value_t = Address::ZERO)]
    token: Address,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  \
    tollway ledger transfer tcp://127.0.0.1:7300 --key payee.key --to 0x… --amount 1000")]
pub(crate) struct TransferArguments {
    /// Where the ledger is.
    #[arg(value_name = "URL")]
    ledger: Place,
    /// The key of the account that pays.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Whose account gets it.
    #[arg(long, value_name = "ADDRESS")]
    to: Address,
    /// How much, in base units.
    #[arg(long)]
    amount: Amount,
    /// The token.
    #[arg(long, value_name = "ADDRESS", default_value_t = Address::ZERO)]
    token: Address,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

/// What `--json` prints. Sums are decimal strings.
#[derive(Serialize)]
struct Balance {
    holder: Address,
    token: Address,
    balance: Amount,
}

pub(super) async fn fund(arguments: FundArguments) -> Result<(), Failure> {
    let FundArguments { ledger, key, to: holder, amount, token, json } = arguments;
    let (ledger, key) = (LedgerClient::connect(&ledger.0).await?, keys::load(&key)?);
    let make = |nonce, expiry| Fund { holder, token, amount, nonce, expiry };
    let balance = give(&ledger, &key, make, |order| ledger.fund(order)).await?;
    show(Balance { holder, token, balance }, json)
}

pub(super) async fn balance(arguments: BalanceArguments) -> Result<(), Failure> {
    let BalanceArguments { ledger, holder, token, json } = arguments;
    let balance = LedgerClient::connect(&ledger.0).await?.balance(holder, token).await?;
    show(Balance { holder, token, balance }, json)
}

pub(super) async fn transfer(arguments: TransferArguments) -> Result<(), Failure> {
    let TransferArguments { ledger, key, to, amount, token, json } = arguments;
    let (ledger, key) = (LedgerClient::connect(&ledger.0).await?, keys::load(&key)?);
    let from = key.address();
    let make = |nonce, expiry| Transfer { from, to, token, amount, nonce, expiry };
    let balance = give(&ledger, &key, make, |order| ledger.transfer(order)).await?;
    show(Balance { holder: from, token, balance }, json)
}

/// Gives an order with a nonce that has not been used. The same order is sent again when its answer was lost, and has its
/// effect once; a new one is only made when the ledger says that another order was faster.
async fn give<M: LedgerMessage + Clone, F>(
    ledger: &LedgerClient,
    key: &SecretKey,
    make: impl Fn(u64, u64) -> M,
    send: impl Fn(Signed<M>) -> F,
) -> Result<Amount, EscrowError>
where
    F: Future<Output = Result<Amount, EscrowError>>,
{
    let mut above = 0;
    loop {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // Nonces rise; the clock does so by itself.
        let nonce = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX).max(above);
        let expiry = u64::try_from((now + LIFETIME).as_millis()).unwrap_or(u64::MAX);
        let order = Signed::sign(make(nonce, expiry), &ledger.identity(), key);
        let mut tries = TRIES;
        let answer = loop {
            tries -= 1;
            match send(order.clone()).await {
                Err(EscrowError::Unavailable(_)) if tries > 0 => {}
                answer => break answer,
            }
        };
        match answer {
            Err(EscrowError::Refused(EscrowRefusal::NonceUsed { last, .. })) if last >= above && last < u64::MAX => {
                above = last + 1;
            }
            answer => return answer,
        }
    }
}

fn show(balance: Balance, json: bool) -> Result<(), Failure> {
    if json {
        output::json(&balance)?;
    } else {
        output::line(&format!("{}: {}", balance.holder, output::amount(balance.balance)))?;
    }
    Ok(())
}
