//! The local ledger's methods as messages: what a payer or a payee sends to a ledger that runs elsewhere, and what comes
//! back. No transport: a service hands the bytes of a call to [`dispatch`], a client sends a [`LedgerCall`].
//!
//! All is postcard. No argument has a collection, so its size is bounded by its type and whoever serves needs no limit
//! beyond that of a small body. Nothing of a call is trusted for having arrived: orders carry their giver's signature,
//! and reading needs no permission, since a channel's id and an account's address are all that is disclosed.

use std::future::Future;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tollway_protocol::payment::ledger_messages::{
    Close, Fund, LedgerIdentity, OpenChannel, RequestClose, Settle, Signed, TopUp, Transfer, Withdraw,
};
use tollway_protocol::payment::{Address, Amount, ChannelId, Signature};

use super::{Escrow, EscrowChannel, EscrowError, EscrowRefusal, LocalLedger, Settlement};

/// The name of the service that a ledger is reached by.
pub const LEDGER_SERVICE: &str = "tollway.ledger";

/// A method of the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LedgerMethod {
    /// [`Identify`] → [`LedgerInfo`].
    Identity,
    /// [`FindChannel`] → [`EscrowChannel`], or nothing when it was never opened.
    Channel,
    /// An order [`OpenChannel`] → [`EscrowChannel`].
    Open,
    /// An order [`TopUp`] → [`EscrowChannel`].
    TopUp,
    /// [`SettleWith`] → [`Settlement`].
    Settle,
    /// [`CloseWith`] → [`Settlement`].
    Close,
    /// An order [`RequestClose`] → [`EscrowChannel`].
    RequestClose,
    /// An order [`Withdraw`] → [`Settlement`].
    Withdraw,
    /// [`FindBalance`] → [`Amount`].
    Balance,
    /// The operator's order [`Fund`] → what is in the account, [`Amount`].
    Fund,
    /// An order [`Transfer`] → what is left in the account, [`Amount`].
    Transfer,
}

impl LedgerMethod {
    /// All of them.
    pub const ALL: [LedgerMethod; 11] = [
        LedgerMethod::Identity,
        LedgerMethod::Channel,
        LedgerMethod::Open,
        LedgerMethod::TopUp,
        LedgerMethod::Settle,
        LedgerMethod::Close,
        LedgerMethod::RequestClose,
        LedgerMethod::Withdraw,
        LedgerMethod::Balance,
        LedgerMethod::Fund,
        LedgerMethod::Transfer,
    ];

    /// The method's name in the service.
    pub const fn name(self) -> &'static str {
        match self {
            LedgerMethod::Identity => "identity",
            LedgerMethod::Channel => "channel",
            LedgerMethod::Open => "open",
            LedgerMethod::TopUp => "top_up",
            LedgerMethod::Settle => "settle",
            LedgerMethod::Close => "close",
            LedgerMethod::RequestClose => "request_close",
            LedgerMethod::Withdraw => "withdraw",
            LedgerMethod::Balance => "balance",
            LedgerMethod::Fund => "fund",
            LedgerMethod::Transfer => "transfer",
        }
    }
}

/// The arguments of one method. They say which method it is and what it answers, so that client and service agree.
pub trait LedgerCall: Serialize + DeserializeOwned + Send {
    /// The method that takes these arguments.
    const METHOD: LedgerMethod;
    /// What it answers when the ledger does not refuse.
    type Answer: Serialize + DeserializeOwned + Send;
}

macro_rules! calls {
    ($($args:ty => $method:ident => $answer:ty;)+) => {
        $(impl LedgerCall for $args {
            const METHOD: LedgerMethod = LedgerMethod::$method;
            type Answer = $answer;
        })+
    };
}

calls! {
    Identify => Identity => LedgerInfo;
    FindChannel => Channel => Option<EscrowChannel>;
    Signed<OpenChannel> => Open => EscrowChannel;
    Signed<TopUp> => TopUp => EscrowChannel;
    SettleWith => Settle => Settlement;
    CloseWith => Close => Settlement;
    Signed<RequestClose> => RequestClose => EscrowChannel;
    Signed<Withdraw> => Withdraw => Settlement;
    FindBalance => Balance => Amount;
    Signed<Fund> => Fund => Amount;
    Signed<Transfer> => Transfer => Amount;
}

/// Asks the ledger who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identify;

/// Who a ledger says it is. Only the chain id and the escrow that the signed terms name are believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerInfo {
    /// The chain id, in the range of local ledgers.
    pub chain_id: u64,
    /// The escrow's address.
    pub escrow: Address,
    /// Whether it makes up the money that a deposit lacks: for development.
    pub dev: bool,
    /// How long a payee may still settle after the payer asked to withdraw, in milliseconds.
    pub grace_ms: u64,
}

impl LedgerInfo {
    /// What vouchers and orders for this ledger are signed for.
    pub const fn identity(&self) -> LedgerIdentity {
        LedgerIdentity { chain_id: self.chain_id, escrow: self.escrow }
    }
}

/// Asks for a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FindChannel {
    /// The channel.
    pub id: ChannelId,
}

/// Asks for what is in an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FindBalance {
    /// Whose account.
    pub holder: Address,
    /// The token.
    pub token: Address,
}

/// An order to settle, and the voucher that it presents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettleWith {
    /// The payee's order.
    pub order: Signed<Settle>,
    /// The signature of the voucher for the order's amount.
    pub voucher: Signature,
}

/// An order to close, and the voucher that it presents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloseWith {
    /// The payee's order.
    pub order: Signed<Close>,
    /// The signature of the voucher for the order's amount; not needed at what was paid out already.
    pub voucher: Option<Signature>,
}

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DispatchError {
    /// The bytes are not the method's arguments.
    #[error("not the arguments of {}: {source}", .method.name())]
    Arguments {
        /// The method.
        method: LedgerMethod,
        /// What is wrong with them.
        source: postcard::Error,
    },
    /// The ledger refuses. The caller is told why, as the application's error: an [`EscrowRefusal`] in postcard.
    #[error(transparent)]
    Refused(EscrowRefusal),
    /// The ledger could not do it, or its answer could not be encoded. The caller may ask again; why is not its business.
    #[error("the ledger is unavailable: {0}")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<EscrowError> for DispatchError {
    fn from(error: EscrowError) -> Self {
        match error {
            EscrowError::Refused(refusal) => DispatchError::Refused(refusal),
            EscrowError::Unavailable(error) => DispatchError::Unavailable(error),
        }
    }
}

/// Answers one call: decodes the arguments strictly, gives the order to the ledger, encodes the answer.
///
/// # Errors
/// See [`DispatchError`].
///
/// # Cancel safety
/// Dropping the future leaves it unknown whether the order took effect; it may be repeated.
pub async fn dispatch(ledger: &LocalLedger, method: LedgerMethod, args: &[u8]) -> Result<Vec<u8>, DispatchError> {
    match method {
        LedgerMethod::Identity => answer(args, |Identify| async { Ok(ledger.info()) }).await,
        LedgerMethod::Channel => answer(args, |FindChannel { id }| ledger.channel(id)).await,
        LedgerMethod::Open => answer(args, |order: Signed<OpenChannel>| ledger.open(order)).await,
        LedgerMethod::TopUp => answer(args, |order: Signed<TopUp>| ledger.top_up(order)).await,
        LedgerMethod::Settle => answer(args, |SettleWith { order, voucher }| ledger.settle(order, voucher)).await,
        LedgerMethod::Close => answer(args, |CloseWith { order, voucher }| ledger.close(order, voucher)).await,
        LedgerMethod::RequestClose => answer(args, |order: Signed<RequestClose>| ledger.request_close(order)).await,
        LedgerMethod::Withdraw => answer(args, |order: Signed<Withdraw>| ledger.withdraw(order)).await,
        LedgerMethod::Balance => answer(args, |FindBalance { holder, token }| ledger.balance(holder, token)).await,
        LedgerMethod::Fund => answer(args, |order: Signed<Fund>| ledger.fund_by(order)).await,
        LedgerMethod::Transfer => answer(args, |order: Signed<Transfer>| ledger.transfer(order)).await,
    }
}

async fn answer<C, F>(args: &[u8], act: impl FnOnce(C) -> F) -> Result<Vec<u8>, DispatchError>
where
    C: LedgerCall,
    F: Future<Output = Result<C::Answer, EscrowError>>,
{
    let call = decode::<C>(args).map_err(|source| DispatchError::Arguments { method: C::METHOD, source })?;
    let answer = act(call).await?;
    postcard::to_stdvec(&answer).map_err(|error| DispatchError::Unavailable(error.into()))
}

/// Nothing may follow the object: bytes that nobody read are bytes that somebody meant something by.
fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, postcard::Error> {
    match postcard::take_from_bytes(bytes)? {
        (object, []) => Ok(object),
        _ => Err(postcard::Error::DeserializeBadEncoding),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fmt::Debug;

    use tollway_protocol::payment::ledger_messages::LedgerMessage;
    use tollway_protocol::payment::{Hash, SecretKey, SignedAmount, Voucher};

    use super::*;
    use crate::escrow::{Ledger, LedgerConfig};

    const TOKEN: Address = Address([0x20; 20]);
    const GRACE_MS: u64 = 1_000;

    fn key(seed: u8) -> SecretKey {
        SecretKey::from_bytes([seed; 32]).unwrap()
    }

    fn ledger() -> LocalLedger {
        let config = LedgerConfig { grace_ms: GRACE_MS, dev: true };
        LocalLedger::with_clock(Ledger::new(LedgerIdentity::of(&key(7)), config), || 5_000)
    }

    fn order<M: LedgerMessage>(message: M, signer: u8) -> Signed<M> {
        Signed::sign(message, &LedgerIdentity::of(&key(7)), &key(signer))
    }

    fn open_order(salt: u8, nonce: u64) -> OpenChannel {
        OpenChannel {
            payer: key(1).address(),
            payee: key(2).address(),
            token: TOKEN,
            salt: Hash([salt; 32]),
            authorized_signer: Address::ZERO,
            deposit: Amount::from(1_000),
            nonce,
            expiry: 0,
        }
    }

    /// What a client does, with the transport left out.
    async fn call<C: LedgerCall>(ledger: &LocalLedger, args: C) -> Result<C::Answer, DispatchError> {
        let bytes = dispatch(ledger, C::METHOD, &postcard::to_stdvec(&args).unwrap()).await?;
        Ok(decode(&bytes).unwrap())
    }

    fn voucher(channel: &EscrowChannel, amount: u64) -> SignedAmount {
        let descriptor = &channel.descriptor;
        let signed = Voucher::sign(&descriptor.voucher_domain(), &key(1), descriptor.id(), Amount::from(amount));
        signed.unwrap().into()
    }

    #[tokio::test]
    async fn every_method_is_answered_over_messages_as_it_is_in_the_process() {
        let ledger = ledger();
        let info = call(&ledger, Identify).await.unwrap();
        assert_eq!(info.identity(), LedgerIdentity::of(&key(7)));
        assert!(info.identity().is_consistent() && info.dev && info.grace_ms == GRACE_MS);

        let opened = call(&ledger, order(open_order(1, 1), 1)).await.unwrap();
        let channel_id = opened.descriptor.id();
        assert_eq!(call(&ledger, FindChannel { id: channel_id }).await.unwrap(), Some(opened.clone()));
        assert_eq!(call(&ledger, FindChannel { id: ChannelId::ZERO }).await.unwrap(), None);

        let more = TopUp { channel_id, deposit: Amount::from(1_500), nonce: 2, expiry: 0 };
        assert_eq!(call(&ledger, order(more, 1)).await.unwrap().deposit, Amount::from(1_500));

        let SignedAmount { amount, signature } = voucher(&opened, 300);
        let settle = SettleWith { order: order(Settle { channel_id, amount }, 2), voucher: signature };
        assert_eq!(call(&ledger, settle).await.unwrap().settled, amount);

        let SignedAmount { amount, signature } = voucher(&opened, 400);
        let close = CloseWith { order: order(Close { channel_id, amount }, 2), voucher: Some(signature) };
        let closed = call(&ledger, close.clone()).await.unwrap();
        assert_eq!((closed.settled, closed.refunded), (amount, Amount::from(1_100)));
        assert_eq!(call(&ledger, close).await.unwrap(), closed);

        let balance = |holder| FindBalance { holder, token: TOKEN };
        assert_eq!(call(&ledger, balance(key(2).address())).await.unwrap(), amount);
        assert_eq!(call(&ledger, balance(key(9).address())).await.unwrap(), Amount::ZERO);
        ledger.read(Ledger::conservation).unwrap();
    }

    #[tokio::test]
    async fn a_withdrawal_goes_over_messages_and_a_refusal_comes_back_as_itself() {
        let ledger = ledger();
        let channel_id = call(&ledger, order(open_order(2, 1), 1)).await.unwrap().descriptor.id();
        let request = RequestClose { channel_id, nonce: 2, expiry: 0 };
        let asked = call(&ledger, order(request, 1)).await.unwrap();
        assert_eq!(asked.close_requested_at_ms, Some(5_000));
        let early = call(&ledger, order(Withdraw { channel_id, nonce: 3, expiry: 0 }, 1)).await;
        let grace = EscrowRefusal::GracePeriod { until_ms: 6_000, now_ms: 5_000 };
        assert!(matches!(early, Err(DispatchError::Refused(refusal)) if refusal == grace));
        let stranger = call(&ledger, order(Withdraw { channel_id, nonce: 3, expiry: 0 }, 9)).await;
        assert!(matches!(stranger, Err(DispatchError::Refused(EscrowRefusal::Unauthorised { .. }))));
    }

    #[tokio::test]
    async fn bytes_that_are_not_the_arguments_change_nothing() {
        let ledger = ledger();
        let good = postcard::to_stdvec(&order(open_order(1, 1), 1)).unwrap();
        let longer = [good.as_slice(), &[0]].concat();
        let shorter = &good[..good.len() - 1];
        for bad in [longer.as_slice(), shorter] {
            let refused = dispatch(&ledger, LedgerMethod::Open, bad).await;
            assert!(matches!(refused, Err(DispatchError::Arguments { method: LedgerMethod::Open, .. })));
        }
        let read = dispatch(&ledger, LedgerMethod::Identity, &[0]).await;
        assert!(matches!(read, Err(DispatchError::Arguments { method: LedgerMethod::Identity, .. })));
        let id = open_order(1, 1).descriptor(&LedgerIdentity::of(&key(7))).id();
        assert_eq!(call(&ledger, FindChannel { id }).await.unwrap(), None);
        assert!(dispatch(&ledger, LedgerMethod::Open, &good).await.is_ok());
    }

    #[test]
    fn method_names_are_unique() {
        for (at, method) in LedgerMethod::ALL.into_iter().enumerate() {
            assert!(LedgerMethod::ALL[..at].iter().all(|other| other.name() != method.name()));
        }
    }

    fn survives<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T) {
        let bytes = postcard::to_stdvec(value).unwrap();
        assert_eq!(&decode::<T>(&bytes).unwrap(), value);
    }

    #[test]
    fn arguments_and_answers_survive_their_encoding() {
        let (channel_id, amount, signature) = (ChannelId([3; 32]), Amount::MAX, key(1).sign_digest(&Hash::ZERO));
        survives(&Identify);
        survives(&FindChannel { id: channel_id });
        survives(&FindBalance { holder: key(1).address(), token: TOKEN });
        survives(&order(open_order(1, u64::MAX), 1));
        survives(&order(TopUp { channel_id, deposit: amount, nonce: 1, expiry: 2 }, 1));
        survives(&SettleWith { order: order(Settle { channel_id, amount }, 2), voucher: signature });
        for voucher in [None, Some(signature)] {
            survives(&CloseWith { order: order(Close { channel_id, amount }, 2), voucher });
        }
        survives(&order(RequestClose { channel_id, nonce: 1, expiry: 2 }, 1));
        survives(&order(Withdraw { channel_id, nonce: 1, expiry: 2 }, 1));
        survives(&LedgerInfo { chain_id: u64::MAX, escrow: TOKEN, dev: true, grace_ms: 1 });
        survives(&Settlement { reference: Hash([1; 32]), settled: amount, refunded: Amount::ZERO });
        let descriptor = open_order(1, 1).descriptor(&LedgerIdentity::of(&key(7)));
        for close_requested_at_ms in [None, Some(u64::MAX)] {
            let (descriptor, settled) = (descriptor.clone(), Amount::ZERO);
            survives(&Some(EscrowChannel {
                descriptor,
                deposit: amount,
                settled,
                close_requested_at_ms,
                finalized: true,
            }));
        }
        survives(&None::<EscrowChannel>);
    }

    /// The number in front is the wire's: a refusal that moves in the list is another one to an older peer.
    #[test]
    fn refusals_survive_their_encoding_and_keep_their_numbers() {
        let (amount, settled, deposit) = (Amount::MAX, Amount::from(1), Amount::from(2));
        let (id, expected) = (ChannelId([3; 32]), TOKEN);
        let refusals = [
            EscrowRefusal::Unauthorised { expected },
            EscrowRefusal::BadVoucher { expected },
            EscrowRefusal::VoucherMissing { amount },
            EscrowRefusal::UnknownChannel(id),
            EscrowRefusal::IdUsed(id),
            EscrowRefusal::Finalized { settled },
            EscrowRefusal::Expired { expiry_ms: 1, now_ms: 2 },
            EscrowRefusal::NonceUsed { nonce: 1, last: 2 },
            EscrowRefusal::NobodyPaid,
            EscrowRefusal::ZeroDeposit,
            EscrowRefusal::InsufficientBalance { needed: amount, available: settled },
            EscrowRefusal::AboveDeposit { amount, deposit },
            EscrowRefusal::NotAboveSettled { amount, settled },
            EscrowRefusal::BelowSettled { amount, settled },
            EscrowRefusal::NoCloseRequested,
            EscrowRefusal::GracePeriod { until_ms: 2, now_ms: 1 },
            EscrowRefusal::TooMuch,
        ];
        for (number, refusal) in refusals.iter().enumerate() {
            survives(refusal);
            assert_eq!(usize::from(postcard::to_stdvec(refusal).unwrap()[0]), number);
        }
    }
}
