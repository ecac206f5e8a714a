//! What the payer does all day: opens, calls, streams, breaks off, keeps and closes, on one channel or several.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tollway::conduit::endpoint::Endpoint;
use tollway::payment::{PaidConnection, Wallet, WalletConfig, WalletError, WalletPhase};
use tollway::protocol::error::Reason;
use tollway::protocol::payment::Amount;
use tollway::rpc::Rx;
use tollway::{Session, SessionConfig};

use crate::broken::BrokenWallet;
use crate::roles::{Failure, RoleArguments, open_wallet, say};
use crate::scene::{self, BUDGET, MAX_AHEAD, Random, SERVICE};

/// The wait before a payee that is not there is called again.
const RETRY: Duration = Duration::from_millis(3);
/// A call that takes longer hangs: nothing in the workload does.
const HANGS: Duration = Duration::from_secs(60);

/// Buys until it is told to finish, then closes every channel.
pub(crate) async fn run(arguments: &RoleArguments, mut finish: watch::Receiver<bool>) -> Result<(), Failure> {
    let mut config = WalletConfig::new(scene::payer_key(), Amount::new(BUDGET));
    config.payee = Some(scene::payee_key().address());
    config.max_ahead = Some(Amount::new(MAX_AHEAD));
    // This payee breaks off for a living: what each break may cost is what is tested.
    config.loss_budget = Some(Amount::MAX);
    config.store = Arc::new(BrokenWallet::new(open_wallet(arguments)?));
    let wallet = Wallet::new(config);
    let payee: Endpoint = format!("tcp://{}", arguments.payee.ok_or("the payee's address is missing")?).parse()?;
    let mut random = Random::new(arguments.seed);
    while !*finish.borrow_and_update() {
        if let Ok(session) = tollway::connect(&payee, SessionConfig::default()).await {
            shop(&wallet, &session, &mut random).await;
            session.close(Reason::new(0, "enough"));
        } else {
            tokio::time::sleep(RETRY).await;
        }
        look_after_ends(&wallet).await;
    }
    loop {
        if close_all(&wallet, &payee).await? {
            say("finished");
            return std::future::pending().await;
        }
        tokio::time::sleep(10 * RETRY).await;
    }
}

/// One to three channels at once, over one session.
async fn shop(wallet: &Wallet, session: &Session, random: &mut Random) {
    let mut lanes = JoinSet::new();
    for _ in 0..*random.pick(&[1, 1, 1, 2, 3]) {
        let (wallet, session, random) = (wallet.clone(), session.clone(), Random::new(random.draw()));
        lanes.spawn(async move { visit(&wallet, &session, random).await });
    }
    while let Some(visited) = lanes.join_next().await {
        match visited {
            Ok(Ok(())) => {}
            Ok(Err(error)) => report(&error),
            Err(panicked) => say(&format!("fault {panicked}")),
        }
    }
}

/// What no kill explains is a fault; that a connection or the ledger has gone is none.
fn report(error: &WalletError) {
    let kind = match error {
        WalletError::Open(_) | WalletError::Ended(_) | WalletError::Timeout(_) => "note",
        WalletError::EscrowUnavailable(_) | WalletError::Escrow(_) => "note",
        // The channel was closed while it was picked: the next one is opened.
        WalletError::Channel { .. } | WalletError::BudgetTooSmall { .. } => "note",
        _ => "fault",
    };
    say(&format!("{kind} {error}"));
}

async fn visit(wallet: &Wallet, session: &Session, mut random: Random) -> Result<(), WalletError> {
    let paid = wallet.open(session, SERVICE).await?;
    for _ in 0..random.below(6) {
        let bought = match random.below(10) {
            0..4 => buy_answers(&paid, &mut random).await,
            4..9 => buy_stream(&paid, &mut random, u32::MAX).await,
            _ => {
                let enough = u32::try_from(random.below(40)).unwrap_or(0);
                buy_stream(&paid, &mut random, enough).await
            }
        };
        if bought.is_err() {
            // The calls fail with the payment or with the connection; only the former is told here.
            return paid.failure().map_or(Ok(()), Err);
        }
    }
    if random.percent(25) { paid.close().await.map(drop) } else { paid.keep().await.map(drop) }
}

struct Broken;

async fn buy_answers(paid: &PaidConnection, random: &mut Random) -> Result<(), Broken> {
    let mut calls = JoinSet::new();
    for _ in 0..1 + random.below(8) {
        let connection = paid.connection().clone();
        let arguments = (1_u32, u32::try_from(random.below(2_000)).unwrap_or(0));
        calls.spawn(async move {
            let call = connection.call::<_, Bytes>(scene::one(), &arguments);
            tokio::time::timeout(HANGS, call).await
        });
    }
    while let Some(answered) = calls.join_next().await {
        match answered {
            Ok(Ok(Ok(_))) => {}
            Ok(Ok(Err(_))) => return Err(Broken),
            _ => {
                say("fault a call hangs");
                return Err(Broken);
            }
        }
    }
    Ok(())
}

/// Reads a stream, or the beginning of one: then it is given up while it flows.
async fn buy_stream(paid: &PaidConnection, random: &mut Random, enough: u32) -> Result<(), Broken> {
    let items = u32::try_from(1 + random.below(120)).unwrap_or(1);
    let bytes = u32::try_from(random.below(1_000)).unwrap_or(0);
    let call = paid.connection().call::<_, Rx<Bytes>>(scene::many(), &(items, bytes));
    let mut stream = call.await.map_err(|_| Broken)?;
    for _ in 0..items.min(enough) {
        match tokio::time::timeout(HANGS, stream.recv()).await {
            Ok(Ok(Some(_))) => {}
            Ok(_) => return Err(Broken),
            Err(_) => {
                say("fault a stream hangs");
                return Err(Broken);
            }
        }
    }
    Ok(())
}

/// Channels whose close was lost on its way are withdrawn from: the payee claims what it is owed.
async fn look_after_ends(wallet: &Wallet) {
    for channel in wallet.channels().await.unwrap_or_default() {
        if !matches!(channel.phase, WalletPhase::Closing { .. } | WalletPhase::Withdrawing) {
            continue;
        }
        let asked = match wallet.refresh(channel).await {
            Ok(channel) if matches!(channel.phase, WalletPhase::Ended { .. }) => continue,
            // Again, if it was asked before: it is not known whether the ledger heard it.
            Ok(channel) => wallet.request_close(channel).await.map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = asked {
            report(&error);
        }
    }
}

/// Whether every channel has ended.
async fn close_all(wallet: &Wallet, payee: &Endpoint) -> Result<bool, WalletError> {
    look_after_ends(wallet).await;
    let mut ended = true;
    for channel in wallet.channels().await? {
        match channel.phase {
            WalletPhase::Ended { .. } => continue,
            WalletPhase::Open | WalletPhase::Opening { .. } => {
                if let Ok(session) = tollway::connect(payee, SessionConfig::default()).await {
                    let closed = match wallet.resume(&session, SERVICE, channel.id()).await {
                        Ok(paid) => paid.close().await.map(drop),
                        Err(error) => Err(error),
                    };
                    if let Err(error) = closed {
                        report(&error);
                    }
                }
            }
            _ => {}
        }
        ended = false;
    }
    Ok(ended)
}
