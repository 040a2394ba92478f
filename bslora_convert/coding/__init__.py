"""A form in codes: what each number costs and loses, how bits are allotted, how vectors are encoded."""
