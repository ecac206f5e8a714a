//! What the session's driver tells the task that runs a payment channel.

use std::collections::VecDeque;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tollway_protocol::payment::Amount;
use tollway_protocol::session::MoneyCount;

/// Payment messages that may wait. A peer that sends more than its counterpart works off loses the oldest: vouchers are
/// cumulative, so the newest says all that those before it said, and everything else is said once.
pub(crate) const MAX_MESSAGES: usize = 64;

/// Something that the session tells its payment channel.
#[derive(Debug, Clone)]
pub(crate) enum PaymentEvent {
    /// A payment message as it was framed.
    Message(Bytes),
    /// Payee: the credit is low.
    Low,
    /// Payee: something waits for money.
    Needed,
    /// Payer: so much was received.
    Received(Amount),
    /// The connection has ended, with these counts.
    Ended(Option<MoneyCount>),
}

/// All that waits. Facts that replace each other take one place.
#[derive(Debug, Default, Clone)]
pub(crate) struct Letters {
    pub(crate) messages: VecDeque<Bytes>,
    /// How many messages there were at most.
    most: usize,
    pub(crate) low: bool,
    pub(crate) needed: bool,
    pub(crate) received: Option<Amount>,
    pub(crate) ended: Option<Option<MoneyCount>>,
}

impl Letters {
    fn is_empty(&self) -> bool {
        self.messages.is_empty() && !self.low && !self.needed && self.received.is_none() && self.ended.is_none()
    }
}

/// A bounded mailbox with a stored permit: what is posted between two waits is not lost.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    letters: Mutex<Letters>,
    posted: Notify,
}

impl Mailbox {
    /// Posts an event. Called under the session's lock, so it does as good as nothing; the wake schedules a task of
    /// this crate and runs no user code.
    pub(crate) fn post(&self, event: PaymentEvent) {
        let mut letters = self.letters.lock();
        match event {
            PaymentEvent::Message(message) => {
                if letters.messages.len() == MAX_MESSAGES {
                    letters.messages.pop_front();
                }
                letters.messages.push_back(message);
                letters.most = letters.most.max(letters.messages.len());
            }
            PaymentEvent::Low => letters.low = true,
            PaymentEvent::Needed => letters.needed = true,
            PaymentEvent::Received(received) => letters.received = letters.received.max(Some(received)),
            PaymentEvent::Ended(money) => letters.ended = Some(money),
        }
        drop(letters);
        self.posted.notify_one();
    }

    /// Messages that wait, and how many did at most.
    pub(crate) fn depth(&self) -> (u64, u64) {
        let letters = self.letters.lock();
        (letters.messages.len() as u64, letters.most as u64)
    }

    /// Waits until something is there and takes all of it.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(crate) async fn take(&self) -> Letters {
        loop {
            let letters = {
                let mut letters = self.letters.lock();
                let most = letters.most;
                std::mem::replace(&mut *letters, Letters { most, ..Letters::default() })
            };
            if !letters.is_empty() {
                return letters;
            }
            self.posted.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_posted_between_two_waits_is_not_lost() {
        let mailbox = Mailbox::default();
        mailbox.post(PaymentEvent::Low);
        assert!(mailbox.take().await.low);
        mailbox.post(PaymentEvent::Received(Amount::new(5)));
        mailbox.post(PaymentEvent::Received(Amount::new(3)));
        let letters = mailbox.take().await;
        assert_eq!((letters.low, letters.received), (false, Some(Amount::new(5))));
    }

    #[tokio::test]
    async fn the_newest_messages_stay_when_there_are_too_many() {
        let mailbox = Mailbox::default();
        for index in 0..=MAX_MESSAGES {
            mailbox.post(PaymentEvent::Message(Bytes::copy_from_slice(&(index as u64).to_be_bytes())));
        }
        let letters = mailbox.take().await;
        assert_eq!(letters.messages.len(), MAX_MESSAGES);
        assert_eq!(letters.messages.front().map(|message| message[7]), Some(1));
    }
}
