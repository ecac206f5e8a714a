//! `#[price(…)]`.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::{Attribute, Error, Lit, LitInt, LitStr, Path, Result};

use crate::parse::once;

/// The price of a method. Numbers are checked here, texts by the compiler: their one parser is a constant function of
/// the protocol.
#[derive(Default)]
pub(crate) struct Price {
    call: Option<u128>,
    item: Option<u128>,
    bytes: Option<LitStr>,
    max: Option<LitInt>,
    with: Option<Path>,
    max_item: Option<Lit>,
    max_answer: Option<Lit>,
}

impl Price {
    /// Takes `#[price]` out of a method's attributes.
    pub(crate) fn take(attributes: &mut Vec<Attribute>) -> Result<Option<Price>> {
        let mut found = None;
        for attribute in attributes.extract_if(.., |attribute| attribute.path().is_ident("price")) {
            let mut price = Price::default();
            attribute.parse_nested_meta(|meta| {
                let Some(key) = meta.path.get_ident().map(ToString::to_string) else {
                    return Err(meta.error("a price has no such part"));
                };
                let value = meta.value()?;
                let span = meta.path.get_ident().map_or_else(proc_macro2::Span::call_site, syn::Ident::span);
                match &*key {
                    "call" => once(&mut price.call, amount(&value.parse()?)?, span),
                    "item" => once(&mut price.item, amount(&value.parse()?)?, span),
                    "bytes" => once(&mut price.bytes, value.parse()?, span),
                    "max" => once(&mut price.max, value.parse()?, span),
                    "with" => once(&mut price.with, value.parse()?, span),
                    "max_item" => once(&mut price.max_item, value.parse()?, span),
                    "max_answer" => once(&mut price.max_answer, value.parse()?, span),
                    _ => Err(meta.error("a price has the parts call, item, bytes, max, with, max_item and max_answer")),
                }
            })?;
            price.check(&attribute)?;
            once(&mut found, price, attribute.pound_token.span)?;
        }
        Ok(found)
    }

    fn check(&self, attribute: &Attribute) -> Result<()> {
        let max = self.max.as_ref().map(amount).transpose()?;
        if let (Some(with), None) = (&self.with, max) {
            let what = "a price that is a function states the most that a call may cost: `max = …`";
            return Err(Error::new_spanned(with, what));
        }
        if self.call.is_none() && self.item.is_none() && self.bytes.is_none() && max.is_none() {
            let what = "a price names what is paid: call, item, bytes or max; a method without a price is free";
            return Err(Error::new_spanned(attribute, what));
        }
        if max.is_some_and(|max| max < self.call.unwrap_or(0)) {
            return Err(Error::new_spanned(&self.max, "the most that a call may cost is less than its call price"));
        }
        Ok(())
    }

    /// The function that says what a call has cost.
    pub(crate) fn with(&self) -> Option<&Path> {
        self.with.as_ref()
    }

    /// The price as a constant expression.
    pub(crate) fn value(&self) -> TokenStream {
        let (call, item) = (self.call.unwrap_or(0), self.item.unwrap_or(0));
        let max = match &self.max {
            Some(max) => quote!(::core::option::Option::Some(#max)),
            None => quote!(::core::option::Option::None),
        };
        let bytes = match &self.bytes {
            Some(text) => quote_spanned!(text.span()=> ::core::option::Option::Some(::tollway::__private::rate(#text))),
            None => quote!(::core::option::Option::None),
        };
        quote!(::tollway::__private::price(#call, #item, #bytes, #max))
    }

    /// The largest item and the largest answer as constant expressions, in bytes.
    pub(crate) fn sizes(&self) -> [TokenStream; 2] {
        let size = |literal: &Option<Lit>, default| match literal {
            Some(Lit::Str(text)) => quote_spanned!(text.span()=> ::tollway::__private::size(#text)),
            Some(number) => quote_spanned!(number.span()=> #number),
            None => default,
        };
        let largest = quote!(::tollway::__private::MAX_BODY);
        [size(&self.max_item, largest.clone()), size(&self.max_answer, largest)]
    }
}

fn amount(number: &LitInt) -> Result<u128> {
    number
        .base10_parse()
        .map_err(|_| Error::new(number.span(), "an amount is a whole number of base units below 2^128"))
}
